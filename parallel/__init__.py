"""Groups and meshes, token dispatch, pipeline schedules, the executor, sharded optimizer engines."""
