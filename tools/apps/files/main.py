from own import fastapi

app = fastapi()
