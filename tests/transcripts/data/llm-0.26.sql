-- What llm 0.26 logged of a model that answers "Hello" and the prompt, and of one tool;
-- `sqlite3 logs.db .dump`, only the tables that an import reads.
CREATE TABLE "attachments" (
   "id" TEXT PRIMARY KEY,
   "type" TEXT,
   "path" TEXT,
   "url" TEXT,
   "content" BLOB
);
INSERT INTO "attachments" VALUES('4c4b6a3be1314ab86138bef4314dde022e600960d8689a2c8f8631802d20dab6','image/png',NULL,NULL,X'89504E470D0A1A0A');
CREATE TABLE "conversations" (
   "id" TEXT PRIMARY KEY,
   "name" TEXT,
   "model" TEXT
);
INSERT INTO "conversations" VALUES('01m8j4g8z15fz1x409mjwqsexs','My name is Ada.','fake');
INSERT INTO "conversations" VALUES('01m8j4g92t14v2gy995pmmj26y','Shout.','fake');
CREATE TABLE "fragments" (
   "id" INTEGER PRIMARY KEY,
   "hash" TEXT,
   "content" TEXT,
   "datetime_utc" TEXT,
   "source" TEXT
);
INSERT INTO "fragments" VALUES(1,'ee5d24e166e61c857b16c9708c35c1f422e6230201ab897be0cebdc854ad2fe4','A long document.','2026-11-28 22:30:37',NULL);
CREATE TABLE "prompt_attachments" (
   "response_id" TEXT REFERENCES "responses"("id"),
   "attachment_id" TEXT REFERENCES "attachments"("id"),
   "order" INTEGER,
   PRIMARY KEY ("response_id", "attachment_id")
);
INSERT INTO "prompt_attachments" VALUES('01m8j4g9026adn6r0msq18mmht','4c4b6a3be1314ab86138bef4314dde022e600960d8689a2c8f8631802d20dab6',0);
CREATE TABLE "prompt_fragments" (
   "response_id" TEXT REFERENCES "responses"("id"),
   "fragment_id" INTEGER REFERENCES "fragments"("id"),
   "order" INTEGER,
   PRIMARY KEY ("response_id", "fragment_id", "order")
);
INSERT INTO "prompt_fragments" VALUES('01m8j4g9026adn6r0msq18mmht',1,0);
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
);
INSERT INTO "responses" VALUES('01m8j4g8z15fz1x409mjwqsext','fake','My name is Ada.','Be brief.',NULL,'{}','Hello My name is Ada.',NULL,'01m8j4g8z15fz1x409mjwqsexs',0,'2026-11-28T22:30:37.281321+00:00',5,2,NULL,NULL);
INSERT INTO "responses" VALUES('01m8j4g9026adn6r0msq18mmht','fake','Read this.',NULL,NULL,'{}','Hello A long document.
Read this.',NULL,'01m8j4g8z15fz1x409mjwqsexs',0,'2026-11-28T22:30:37.314630+00:00',5,2,NULL,NULL);
INSERT INTO "responses" VALUES('01m8j4g92xz3pmhh9d594n3kjd','fake','Shout.',NULL,NULL,'{}','',NULL,'01m8j4g92t14v2gy995pmmj26y',0,'2026-11-28T22:30:37.405570+00:00',5,2,NULL,NULL);
INSERT INTO "responses" VALUES('01m8j4g92xz3pmhh9d594n3kje','fake','',NULL,NULL,'{}','Hello ADA',NULL,'01m8j4g92t14v2gy995pmmj26y',0,'2026-11-28T22:30:37.405661+00:00',5,2,NULL,NULL);
CREATE TABLE "system_fragments" (
   "response_id" TEXT REFERENCES "responses"("id"),
   "fragment_id" INTEGER REFERENCES "fragments"("id"),
   "order" INTEGER,
   PRIMARY KEY ("response_id", "fragment_id", "order")
);
CREATE TABLE "tool_calls" (
   "id" INTEGER PRIMARY KEY,
   "response_id" TEXT REFERENCES "responses"("id"),
   "tool_id" INTEGER REFERENCES "tools"("id"),
   "name" TEXT,
   "arguments" TEXT,
   "tool_call_id" TEXT
);
INSERT INTO "tool_calls" VALUES(1,'01m8j4g92xz3pmhh9d594n3kjd',1,'upper','{"text": "ada"}','call_1');
CREATE TABLE "tool_results" (
   "id" INTEGER PRIMARY KEY,
   "response_id" TEXT REFERENCES "responses"("id"),
   "tool_id" INTEGER REFERENCES "tools"("id"),
   "name" TEXT,
   "output" TEXT,
   "tool_call_id" TEXT,
   "instance_id" INTEGER REFERENCES "tool_instances"("id")
);
INSERT INTO "tool_results" VALUES(1,'01m8j4g92xz3pmhh9d594n3kje',1,'upper','ADA','call_1',NULL);
