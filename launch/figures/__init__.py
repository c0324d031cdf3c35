"""What a run's directory shows: curves, charts and figures, for the report and for the live page."""
