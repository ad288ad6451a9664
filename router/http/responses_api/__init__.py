"""The Responses API (`/v1/responses`, OpenAI's), translated to and from chat calls."""
