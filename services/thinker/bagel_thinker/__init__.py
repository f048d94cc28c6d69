"""The Thinker service: reads prompts and images, writes text and gives out K/V. Arrives with the services."""
