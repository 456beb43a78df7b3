"""What passes are written with: patterns, replacing, wrapping, insertion that keeps metadata."""
