"""Language models that read the beginning of a document in both directions."""
