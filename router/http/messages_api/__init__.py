"""The Messages API (`/v1/messages`, Anthropic's), translated to and from chat calls."""
