"""Pipeline schedules as data: build them by name, check them, look at them, exchange them."""

from ilm_compile.schedule import split as split  # whose schedules are known by name from then on
from ilm_compile.schedule.actions import Action as Action
from ilm_compile.schedule.actions import Kind as Kind
from ilm_compile.schedule.builders import build as build
from ilm_compile.schedule.builders import known_schedules as known_schedules
from ilm_compile.schedule.builders import register_schedule as register_schedule
from ilm_compile.schedule.builders import schedule_of as schedule_of
from ilm_compile.schedule.builders import stage_ranks as stage_ranks
from ilm_compile.schedule.check import check as check
from ilm_compile.schedule.comms import forward_only as forward_only
from ilm_compile.schedule.comms import insert_comms as insert_comms
from ilm_compile.schedule.schedule import Schedule as Schedule
from ilm_compile.schedule.schedule import peak_in_flight as peak_in_flight
from ilm_compile.schedule.search import search as search
from ilm_compile.schedule.simulate import Simulation as Simulation
from ilm_compile.schedule.simulate import StageTimes as StageTimes
from ilm_compile.schedule.simulate import simulate as simulate
from ilm_compile.schedule.vee import down_and_up as down_and_up
