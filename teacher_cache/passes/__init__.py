"""How is a unit of rows answered, scored and written?

One pass per file, fed from and drained into a writer's thread, stopped between units.
"""
