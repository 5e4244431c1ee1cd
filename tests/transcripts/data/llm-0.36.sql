-- What llm 0.36 logged of a model that answers "Hello" and the prompt, and of one tool;
-- `sqlite3 logs.db .dump`, only the tables that an import reads.
CREATE TABLE "conversations" (
   "id" TEXT PRIMARY KEY,
   "name" TEXT,
   "model" TEXT
);
CREATE TABLE "fragments" (
   "id" INTEGER PRIMARY KEY,
   "hash" TEXT,
   "content" TEXT,
   "datetime_utc" TEXT,
   "source" TEXT
);
INSERT INTO "fragments" VALUES(1,'ee5d24e166e61c857b16c9708c35c1f422e6230201ab897be0cebdc854ad2fe4','A long document.','2026-11-28 22:29:25',NULL);
CREATE TABLE "messages" (
   "hash" TEXT PRIMARY KEY,
   "parent_hash" TEXT REFERENCES "messages"("hash"),
   "role" TEXT,
   "provider_metadata" TEXT
);
INSERT INTO "messages" VALUES('b2:074dea0bd0259e0d5dca16426a45e4f5',NULL,'system',NULL);
INSERT INTO "messages" VALUES('b2:96f2820f2d4d1f5a5ff7847a27be189d','b2:074dea0bd0259e0d5dca16426a45e4f5','user',NULL);
INSERT INTO "messages" VALUES('b2:bf8ac1a64f610ece4c3fb59e2c8d1ace','b2:96f2820f2d4d1f5a5ff7847a27be189d','assistant',NULL);
INSERT INTO "messages" VALUES('b2:45886dd82fc5c2f30097962a77f243e4','b2:bf8ac1a64f610ece4c3fb59e2c8d1ace','user',NULL);
INSERT INTO "messages" VALUES('b2:fe58201b6db0219c721e4e5d5c8a479f','b2:45886dd82fc5c2f30097962a77f243e4','assistant',NULL);
INSERT INTO "messages" VALUES('b2:8c29017561df3f1ded784fdc4ec5d42c',NULL,'user',NULL);
INSERT INTO "messages" VALUES('b2:1efa9a59a6ee381296e949296b03dfa7','b2:8c29017561df3f1ded784fdc4ec5d42c','assistant',NULL);
INSERT INTO "messages" VALUES('b2:cb746948ddf0362ada8a7d7efac8f3a0','b2:1efa9a59a6ee381296e949296b03dfa7','tool',NULL);
INSERT INTO "messages" VALUES('b2:c601fda1112a10d784396b14eb0bd1e8','b2:cb746948ddf0362ada8a7d7efac8f3a0','assistant',NULL);
CREATE TABLE "parts" (
   "id" INTEGER PRIMARY KEY,
   "message_hash" TEXT REFERENCES "messages"("hash"),
   "position" INTEGER,
   "type" TEXT,
   "tool_name" TEXT,
   "text" TEXT,
   "payload" TEXT
);
INSERT INTO "parts" VALUES(1,'b2:074dea0bd0259e0d5dca16426a45e4f5',0,'text',NULL,'Be brief.',NULL);
INSERT INTO "parts" VALUES(2,'b2:96f2820f2d4d1f5a5ff7847a27be189d',0,'text',NULL,'My name is Ada.',NULL);
INSERT INTO "parts" VALUES(3,'b2:bf8ac1a64f610ece4c3fb59e2c8d1ace',0,'text',NULL,'Hello My name is Ada.',NULL);
INSERT INTO "parts" VALUES(4,'b2:45886dd82fc5c2f30097962a77f243e4',0,'text',NULL,NULL,'{"text_ref": [{"fragment": 1}, {"literal": "\nRead this."}]}');
INSERT INTO "parts" VALUES(5,'b2:fe58201b6db0219c721e4e5d5c8a479f',0,'text',NULL,'Hello A long document.
Read this.',NULL);
INSERT INTO "parts" VALUES(6,'b2:8c29017561df3f1ded784fdc4ec5d42c',0,'text',NULL,'Shout.',NULL);
INSERT INTO "parts" VALUES(7,'b2:1efa9a59a6ee381296e949296b03dfa7',0,'tool_call','upper',NULL,'{"name": "upper", "arguments": {"text": "ada"}, "tool_call_id": "call_1"}');
INSERT INTO "parts" VALUES(8,'b2:cb746948ddf0362ada8a7d7efac8f3a0',0,'tool_result','upper',NULL,'{"name": "upper", "output": "ADA", "tool_call_id": "call_1"}');
INSERT INTO "parts" VALUES(9,'b2:c601fda1112a10d784396b14eb0bd1e8',0,'text',NULL,'Hello ADA',NULL);
CREATE TABLE "responses" (
   "id" TEXT PRIMARY KEY,
   "model" TEXT,
   "prompt" TEXT,
   "system" TEXT,
   "prompt_json" TEXT,
   "options_json" TEXT,
   "response" TEXT,
   "response_json" TEXT,
   "conversation_id" TEXT REFERENCES "conversations"("id"),
   "duration_ms" INTEGER,
   "datetime_utc" TEXT,
   "input_tokens" INTEGER,
   "output_tokens" INTEGER,
   "token_details" TEXT,
   "schema_id" TEXT REFERENCES "schemas"("id")
, "resolved_model" TEXT, "reasoning" TEXT);
CREATE TABLE "threads" (
   "id" TEXT PRIMARY KEY,
   "name" TEXT,
   "tip_message_hash" TEXT REFERENCES "messages"("hash"),
   "forked_from" TEXT REFERENCES "threads"("id"),
   "datetime_utc" TEXT
);
INSERT INTO "threads" VALUES('01m8j4e07wfxap8a0tyrww7n92','My name is Ada.','b2:fe58201b6db0219c721e4e5d5c8a479f',NULL,'2026-11-28 22:29:25.214968+00:00');
INSERT INTO "threads" VALUES('01m8j4e2mjqyb6eh7vsxjnh30d','Shout.','b2:c601fda1112a10d784396b14eb0bd1e8',NULL,'2026-11-28 22:29:25.270699+00:00');
CREATE TABLE "turns" (
   "id" TEXT PRIMARY KEY,
   "thread_id" TEXT REFERENCES "threads"("id"),
   "parent_message_hash" TEXT REFERENCES "messages"("hash"),
   "tip_message_hash" TEXT REFERENCES "messages"("hash"),
   "model" TEXT,
   "resolved_model" TEXT,
   "options_json" TEXT,
   "schema_id" TEXT REFERENCES "schemas"("id"),
   "input_tokens" INTEGER,
   "output_tokens" INTEGER,
   "token_details" TEXT,
   "duration_ms" INTEGER,
   "datetime_utc" TEXT
, "response_json" TEXT);
INSERT INTO "turns" VALUES('01m8j4e07wfxap8a0tyrww7n93','01m8j4e07wfxap8a0tyrww7n92','b2:96f2820f2d4d1f5a5ff7847a27be189d','b2:bf8ac1a64f610ece4c3fb59e2c8d1ace','fake',NULL,NULL,NULL,5,2,NULL,0,'2026-11-28T22:29:22.812466+00:00',NULL);
INSERT INTO "turns" VALUES('01m8j4e2kq7wmqz6qje6k9wkkt','01m8j4e07wfxap8a0tyrww7n92','b2:45886dd82fc5c2f30097962a77f243e4','b2:fe58201b6db0219c721e4e5d5c8a479f','fake',NULL,NULL,NULL,5,2,NULL,0,'2026-11-28T22:29:25.239586+00:00',NULL);
INSERT INTO "turns" VALUES('01m8j4e2mn52f2wr3thn3150je','01m8j4e2mjqyb6eh7vsxjnh30d','b2:8c29017561df3f1ded784fdc4ec5d42c','b2:1efa9a59a6ee381296e949296b03dfa7','fake',NULL,NULL,NULL,5,2,NULL,0,'2026-11-28T22:29:25.269724+00:00',NULL);
INSERT INTO "turns" VALUES('01m8j4e2mn52f2wr3thn3150jf','01m8j4e2mjqyb6eh7vsxjnh30d','b2:cb746948ddf0362ada8a7d7efac8f3a0','b2:c601fda1112a10d784396b14eb0bd1e8','fake',NULL,NULL,NULL,5,2,NULL,0,'2026-11-28T22:29:25.269992+00:00',NULL);
