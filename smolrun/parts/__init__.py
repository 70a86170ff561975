"""What algorithms share: placement, gradient buckets, precision, quantization, replicas."""
