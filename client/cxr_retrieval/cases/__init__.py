"""What is known of a radiograph besides its pixels: manifests, clinical fields, public data sets."""
