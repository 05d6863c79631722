"""Models that lie on a Hub: found, read ahead of the conversion, published.

Everything goes through huggingface_hub, so that HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
proxies mean what its users expect; it is imported when a Hub is really spoken to.
"""
