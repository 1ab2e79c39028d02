"""The modelling code that travels with exported masked diffusion models."""
