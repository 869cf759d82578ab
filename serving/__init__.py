"""What carries serve.py: OpenAI's protocol, the texts that answers are made of, guards, figures."""
