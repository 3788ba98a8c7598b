import os

SECRET_KEY = "of nobody, 0123456789 0123456789"
SQLALCHEMY_DATABASE_URI = f"sqlite:///{os.path.dirname(os.path.abspath(__file__))}/superset.db"
