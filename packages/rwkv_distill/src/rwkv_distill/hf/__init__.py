"""The student as a transformers model. These files travel with every exported folder, so they import nothing of this package."""
