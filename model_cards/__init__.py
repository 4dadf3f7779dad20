"""Jinja templates of the model-card sections, one per kind of artifact."""
