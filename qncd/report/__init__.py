"""The report of quantized runs as one HTML file: what they are, what each layer got, and pictures to judge them by."""
