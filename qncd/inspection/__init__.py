"""Looking into a quantized model: a table of its layers, and pictures of what was measured on the way."""
