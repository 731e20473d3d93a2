"""The service: a trained model behind HTTP and a command line."""
