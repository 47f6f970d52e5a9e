"""Any OpenAI-compatible vision-language endpoint, and the embedded one that needs neither key nor network."""
