"""An HTTP server with OpenAI's routes, replicas that compute, and a page that shows the loops."""
