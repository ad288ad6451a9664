"""The gRPC protocol of gateways and operator; `arriero/v1/inference.proto` documents the API."""
