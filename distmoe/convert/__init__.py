"""Models of Hugging Face in and out: a file for every architecture, found by ARCHITECTURES."""
