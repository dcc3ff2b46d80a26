"""torch_tkv inside other libraries, one module each; none is imported by `import torch_tkv`."""
