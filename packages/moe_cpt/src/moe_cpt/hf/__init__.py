"""Code that an exported folder carries along: it imports nothing but torch and transformers."""
