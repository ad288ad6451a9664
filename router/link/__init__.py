"""The connection between gateways and leaders: framing, messages, client end and server end."""
