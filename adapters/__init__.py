"""One adapter a framework; each imports its framework, and is imported only once a handle of it is seen."""
