"""Find models on a Hub, fetch them ahead of the conversion, and publish outputs.

Everything goes through huggingface_hub, so that HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and
proxies mean what its users expect.  It is imported when a Hub is first asked.
"""
