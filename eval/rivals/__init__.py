"""Other programs that run the same float model, for `quantize bench --rivals`; one file each, listed in `base.FILES`."""
