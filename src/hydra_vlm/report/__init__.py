"""The report: a run's records → comparison → figures → one page. Knows nothing but records."""
