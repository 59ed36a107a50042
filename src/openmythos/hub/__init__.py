"""Models in other formats: import of public looped models, export to Hugging Face."""
