"""A name becomes a classifier: loaded, changed, frozen, adapted, compiled."""
