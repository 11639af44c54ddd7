"""Evaluation: tasks made offline, methods that read the cache in different ways, and the loop that runs both."""
