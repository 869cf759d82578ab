"""The server's parts: OpenAI's protocol, the texts of an answer, access control, and metrics."""
