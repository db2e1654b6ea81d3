"""What an experiment is: spec, models, probes, views, comparison and export."""
