"""The Thinker service: reads prompts and images, writes text and gives out the K/V that pictures are drawn from."""
