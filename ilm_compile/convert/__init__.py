"""Weights from and to other formats, tensor by tensor and in pieces: memory stays bounded.

A `Source` knows the names and shapes of its tensors and reads any box of one. Reading a format
wraps a source of files so that it looks like the model's own tensors; writing one wraps it the
other way.
"""

from ilm_compile.convert.formats import FORMATS as FORMATS
from ilm_compile.convert.formats import open_weights as open_weights
from ilm_compile.convert.formats import to_format as to_format
from ilm_compile.convert.formats import write_model as write_model
from ilm_compile.convert.load import load_weights as load_weights
from ilm_compile.convert.write import write_weights as write_weights
