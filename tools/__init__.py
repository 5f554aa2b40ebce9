"""The command line, evaluation, report, doctor, planner and benchmarks."""

from tools.own_process import require_own_packages

require_own_packages()  # every way to start the program comes here first

from shared.process.parent_watch import end_with_parent  # noqa: E402 - this program's own, as is known by now

end_with_parent()  # a phase with its run, a process of vLLM with its build, from their first moment
