"""The command line, evaluation, report, doctor, planner and benchmarks."""
