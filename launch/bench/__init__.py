"""`baton bench`: a load test of any OpenAI endpoint.

Of the orchestrator it uses the transport and the SSE reader, and what those two hand out.
"""
