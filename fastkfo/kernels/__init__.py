"""Raw kernels and the choice among them; nothing here knows of autograd."""
