"""Many requests at once over one cache: workload, engine, metrics. Torch only where a step is computed."""
