"""The planner: model families, axis algebra, layouts, plans and checkpoint files. Free of torch at import."""
