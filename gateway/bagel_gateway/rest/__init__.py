"""The gateway's REST front: the OpenAI API for images and chats, and plain HTTP for operators."""
