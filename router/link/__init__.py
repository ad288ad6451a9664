"""The link between gateways and leaders: framing, messages, client, server, leader RPC."""
