"""Files and batches (`/v1/files`, `/v1/batches`, OpenAI's)."""
