"""What a program costs: FLOPs, bytes, seconds and memory, from graph and hardware table."""

from ilm_compile.cost.collectives import collective_bytes as collective_bytes
from ilm_compile.cost.collectives import collective_time as collective_time
from ilm_compile.cost.flops import backward_flops as backward_flops
from ilm_compile.cost.flops import forward_flops as forward_flops
from ilm_compile.cost.flops import forward_flops_by_region as forward_flops_by_region
from ilm_compile.cost.flops import model_flops as model_flops
from ilm_compile.cost.hardware import HARDWARE as HARDWARE
from ilm_compile.cost.hardware import Hardware as Hardware
from ilm_compile.cost.hardware import hardware_named as hardware_named
from ilm_compile.cost.memory import gradient_bytes as gradient_bytes
from ilm_compile.cost.memory import held_bytes as held_bytes
from ilm_compile.cost.memory import static_bytes_per_parameter as static_bytes_per_parameter
from ilm_compile.cost.roofline import node_bytes as node_bytes
from ilm_compile.cost.roofline import node_time as node_time
from ilm_compile.cost.saved_bytes import region_bytes as region_bytes
from ilm_compile.cost.saved_bytes import saved_bytes as saved_bytes
