"""The console: a page in the browser for chats and for the state of the cluster."""
