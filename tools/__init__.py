"""The command line, evaluation, report, doctor, planner and benchmarks."""

from tools.own_packages import require_own_packages

require_own_packages()  # every way to start the program comes here first
