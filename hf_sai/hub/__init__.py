"""The Hub side: our section of the model card."""
