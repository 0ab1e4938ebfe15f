"""A small Hub: the endpoints that huggingface_hub calls, over a folder, with faults on request."""
