"""The size at which a page is shown to the model."""
